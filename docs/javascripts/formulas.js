// Render the formulas that the Markdown extension marks. KaTeX stands in vendor/: the site needs no network.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const displayed = element.textContent.trim().startsWith("\\[");
    const source = element.textContent.trim().slice(2, -2); // without the delimiters
    katex.render(source, element, { displayMode: displayed, throwOnError: false });
  }
});
