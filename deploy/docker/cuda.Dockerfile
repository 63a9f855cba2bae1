# foveate serve on NVIDIA GPUs, from the root of the repository: docker build -f deploy/docker/cuda.Dockerfile -t foveate:cuda .
FROM node:22-bookworm-slim AS page
WORKDIR /src
COPY web web
RUN cd web && npm ci && npm run build

FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-pip python3-venv g++ cmake make ninja-build \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
COPY --from=page /src/python/foveate/serve/static python/foveate/serve/static
RUN python3 -m venv /build \
    && FOVEATE_CUDA=ON /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:12.8.1-base-ubuntu24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/foveate
ENV PATH=/opt/foveate/bin:$PATH
# torch from the default index brings the CUDA libraries that it needs.
RUN pip install --no-cache-dir torch==2.13.0
COPY --from=build /wheels /wheels
RUN wheel=$(ls /wheels/foveate-*.whl) && pip install --no-cache-dir "$wheel[serve]" && rm -r /wheels \
    && useradd --create-home --uid 10001 foveate
USER foveate
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["foveate", "serve", "--host", "0.0.0.0", "--device", "cuda"]
CMD ["--model", "model=/models/model"]
