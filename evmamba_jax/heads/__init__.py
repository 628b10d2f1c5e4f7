"""Heads of detectors and segmenters: modules from a backbone's maps to logits, no training and no decoding."""
