# docker build -t qlora .
# docker run --gpus all --shm-size 8g -v "$PWD:/work" -v qlora-cache:/cache qlora train --config run.yaml --resume
FROM python:3.12-slim

# Triton compiles its kernels' launchers with a C compiler the first time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/qlora
COPY constraints.txt pyproject.toml README.md ./
COPY qlora_cli qlora_cli
COPY examples examples
RUN pip install --no-cache-dir --constraint constraints.txt ".[gguf,tensorboard]"

ENV QLORA_CACHE=/cache/qlora HF_HOME=/cache/huggingface
WORKDIR /work
# As process 1 it gets the signals itself: SIGTERM finishes the step and saves it.
ENTRYPOINT ["qlora"]
CMD ["--help"]
