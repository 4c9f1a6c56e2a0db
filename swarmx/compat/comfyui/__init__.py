"""A front that speaks ComfyUI's API over several ComfyUI servers: durable jobs, placed by SwarmX's policies."""
