"""What changes a routing after the router."""
