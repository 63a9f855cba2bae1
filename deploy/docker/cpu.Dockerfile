# foveate serve on CPUs, from the root of the repository: docker build -f deploy/docker/cpu.Dockerfile -t foveate .
FROM node:22-bookworm-slim AS page
WORKDIR /src
COPY web web
RUN cd web && npm ci && npm run build

FROM python:3.11-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ cmake make ninja-build \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
COPY --from=page /src/python/foveate/serve/static python/foveate/serve/static
RUN FOVEATE_CUDA=OFF pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
# The index has a torch without CUDA's libraries, which are some gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch==2.13.0 --index-url "$TORCH_INDEX"
COPY --from=build /wheels /wheels
RUN wheel=$(ls /wheels/foveate-*.whl) && pip install --no-cache-dir "$wheel[serve]" && rm -r /wheels \
    && useradd --create-home --uid 10001 foveate
USER foveate
EXPOSE 8000
# /health is 200 while models load, too, and fails only for a process that had better be started again.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# A container listens to others, so the server wants a key: --api-key-file, or FOVEATE_API_KEY in the environment.
ENTRYPOINT ["foveate", "serve", "--host", "0.0.0.0"]
CMD ["--model", "model=/models/model"]
