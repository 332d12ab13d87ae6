# The broker, its command line and `idemq bench`. Build: docker build -t idemq .
# Run: docker run -v idemq-data:/data -p 7750:7750 -p 7751:7751 idemq
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY broker broker
COPY bench bench
RUN python3 -m venv /opt/idemq && /opt/idemq/bin/pip install --no-cache-dir . \
    && /opt/idemq/bin/pip uninstall -y pip setuptools

FROM python:3.11-slim
COPY --from=build /opt/idemq /opt/idemq
# Any UID may run it (--user 12345:0), so the data directory belongs to group 0.
RUN useradd --system --uid 7750 --gid 0 --home-dir /data --no-create-home idemq \
    && install -d -o idemq -g 0 -m 2770 /data
ENV PATH=/opt/idemq/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    IDEMQ_HOST=0.0.0.0 \
    IDEMQ_DATA_DIR=/data
USER 7750:0
WORKDIR /data
# /tmp too: `idemq bench` makes its stores there, and measures nothing on a file system of layers.
VOLUME /data /tmp
EXPOSE 7750 7751
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["idemq", "healthcheck"]
ENTRYPOINT ["idemq"]
CMD ["serve"]
