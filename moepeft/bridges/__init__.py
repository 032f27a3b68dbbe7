"""Bridges to other libraries; each imports its own only when it is used."""
