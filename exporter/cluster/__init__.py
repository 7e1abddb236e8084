"""Calibration, and the drift of a bundle, on the workers of a Dask cluster: the bytes are those of one process."""

from exporter.cluster.connection import Cluster, ClusterError, connect
from exporter.cluster.evaluate import evaluate, total
from exporter.cluster.observe import observe

__all__ = ["Cluster", "ClusterError", "connect", "evaluate", "observe", "total"]
