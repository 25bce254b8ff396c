"""Export of a merged model to where people run it: GGUF for llama.cpp, a Modelfile for Ollama."""
