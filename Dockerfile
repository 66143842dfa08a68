# The runtime alone: judges images by an exported bundle, without torch, root rights or a network.
#
#   docker build -t anomalyst-runtime .
#   docker run --rm --network none --read-only --user "$(id -u):$(id -g)" -v "$PWD:/data" \
#       anomalyst-runtime predict exported new-images -o judged
#
# Exports made with --format openvino need: docker build --build-arg EXTRAS=[openvino] ...
FROM python:3.12-slim AS build
ARG EXTRAS=""
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m venv /opt/anomalyst \
    && /opt/anomalyst/bin/pip install --no-cache-dir ".${EXTRAS}" \
    && /opt/anomalyst/bin/pip uninstall --yes pip

FROM python:3.12-slim
COPY --from=build /opt/anomalyst /opt/anomalyst
ENV PATH="/opt/anomalyst/bin:$PATH" ORT_DISABLE_TELEMETRY=1
# A number, so that it needs no entry in /etc/passwd; --user at the start takes another.
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["anomalyst"]
CMD ["--help"]
