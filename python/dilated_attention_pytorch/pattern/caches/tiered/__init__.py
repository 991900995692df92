"""V3's cache. Nothing outside depends on it but the names that the package exports."""
