"""Turn bytes on disk into named tensors.

`dtypes`, `catalog`, `kinds`, `header`, `index`, `joining`, `unpickling`, `pickled`, `locate` describe a checkpoint and
import no torch; `pages`, `mapping`, `readahead`, `guard` give its bytes to tensors; `empty` and `bind` fill any module
with them. This room knows no architecture, no device but the CPU, and no other room.
"""
