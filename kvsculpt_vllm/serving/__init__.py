"""What clients and operators talk to: HTTP routes, metrics, dashboard."""
