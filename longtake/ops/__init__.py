"""One operation per file: a plain torch reference, later a fused kernel, and the rule that picks one."""
