"""What runs for which input: experts for tokens, filters for images; routers learn it, and expected and worst cost are counted."""
