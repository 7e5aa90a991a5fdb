def __getattr__(n): return lambda names: None
