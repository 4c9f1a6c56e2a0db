"""The slow loop beside the fast one: a language model that proposes bounded actions. Nothing is in here yet."""
