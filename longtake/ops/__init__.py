"""One operation per file: a plain torch reference, fused kernels, and the rule that picks one."""
