"""What the host keeps between jitted steps: no device array is touched here."""
