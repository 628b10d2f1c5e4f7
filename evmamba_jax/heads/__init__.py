"""Heads of detectors and segmenters: modules from the maps of a backbone to raw outputs, no training and no decoding."""
