"""What the processes tell each other: commands, spans, reasons, records and the books."""
