"""Self-contained HTML pages: jinja2 templates, style sheets, scripts and plots."""
