"""V3's cache. Nothing outside knows it but the names that the package exports."""
