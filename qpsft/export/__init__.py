"""`qpsft export` and `qpsft push`: GGUF, Ollama, vLLM, the Hub."""
