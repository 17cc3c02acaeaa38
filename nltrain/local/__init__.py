"""Everything that a run needs, on one machine: an S3 server, a Ray cluster, the demo and the drill."""
