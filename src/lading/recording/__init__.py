"""What happened inside a model: tensors kept at chosen sites, for whoever asked, and nothing for anybody else.

`sites` finds modules by names and patterns, `selection` says what of a tensor is kept, `capture` listens.
"""
