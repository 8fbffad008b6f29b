"""One page of HTML about one posterior, or about several that are compared."""
