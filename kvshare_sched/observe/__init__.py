"""What people and Prometheus are shown: series, metrics, explanations, pages as text."""
