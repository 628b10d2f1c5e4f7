"""Selective scans for vision state-space models: over sequences, and over images along any orders of their pixels."""

from pallas_kernels.orders import ATROUS, CROSS, Chain, Order
from pallas_kernels.scan2d import scan2d
from pallas_kernels.selective_scan import selective_scan

__all__ = ["ATROUS", "CROSS", "Chain", "Order", "scan2d", "selective_scan"]
