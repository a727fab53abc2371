"""Facts about formats and devices, each with its source."""
