"""Selective scans for vision state-space models: over sequences, and over images along any orders of their pixels."""

from pallas_kernels.orders import ATROUS, CROSS, Chain, Order
from pallas_kernels.scan_1d import selective_scan
from pallas_kernels.scan_2d import scan2d

__all__ = ["ATROUS", "CROSS", "Chain", "Order", "scan2d", "selective_scan"]
