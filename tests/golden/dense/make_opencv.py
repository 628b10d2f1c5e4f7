"""Make opencv.npz, small images through OpenCV: ``python make_opencv.py``, with opencv-python-headless 4.10.0.84.

The images are wider than the vectors of its fast code, which rounds otherwise than what it does at the end of a row.
"""

from pathlib import Path

import cv2
import numpy as np

random = np.random.default_rng(7)
image = random.integers(0, 256, (21, 43, 3), np.uint8)
image[0, :32, 0], image[0, :32, 1:] = 200, 0  # saturated, and grey
image[1] = image[1, :, :1]
hsv = image.copy()
hsv[..., 0] %= 180
arrays = {"image": image, "hsv": hsv}
arrays["image_to_hsv"] = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
arrays["hsv_to_image"] = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
for height, width in ((42, 86), (10, 21), (7, 90), (33, 1), (1, 43), (25, 52)):
    for name, method in (("bilinear", cv2.INTER_LINEAR), ("nearest", cv2.INTER_NEAREST)):
        arrays[f"{name}_{height}_{width}"] = cv2.resize(image, (width, height), interpolation=method)
np.savez_compressed(Path(__file__).with_name("opencv.npz"), **arrays)
