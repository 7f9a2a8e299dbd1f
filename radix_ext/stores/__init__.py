"""Where donors are kept."""
