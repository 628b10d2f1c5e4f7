"""Heads of detectors and segmenters: modules from a backbone's maps to raw outputs, no training and no decoding."""
