"""Decide which block of a model rests where, prove how good that is, and say why.

`ties` and `blocks` describe a module; `budget` what memory there is; `optimum`, `streaming`, `packing` and `anywhere`
solve; `bound` and `minimum` prove; `advice` says what more memory would change; `planner` composes all into a
`plan.Plan`. Pure functions over names and integers, but for
`hardware` (what the machine has) and `trace` (a forward on fake tensors). This room reads no checkpoint and knows no
library of models.
"""
