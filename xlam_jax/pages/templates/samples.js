
// Adds a box that hides the samples whose calls are the recorded ones.
const about = document.getElementById("about-samples");
if (about) {
  const label = about.appendChild(document.createElement("label"));
  const box = label.appendChild(document.createElement("input"));
  label.className = "filter";
  box.type = "checkbox";
  label.append(" only those that are not exact");
  box.addEventListener("change", () => {
    for (const card of document.querySelectorAll(".sample[data-exact=yes]")) card.hidden = box.checked;
  });
}
