"""The page of `cxrdist app`: try a trained model on an X-ray in a browser. Needs the extra `app` (Gradio)."""
