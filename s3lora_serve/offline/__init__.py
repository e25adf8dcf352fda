"""Operations on adapters that are not being served: scan, strip, export, summarise."""
