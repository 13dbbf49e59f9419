"""Runs in each worker's process: samples queries, solves, writes pages, and reads them in attention."""
