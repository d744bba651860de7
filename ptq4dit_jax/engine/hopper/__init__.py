"""Kernels for Hopper GPUs, in Pallas' Mosaic GPU. Only this folder touches that moving interface."""
