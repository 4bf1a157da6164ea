"""Helios as a MODEL of the host: network, loading, offloading, compiling."""
