def missing_parts(settings): return []
