"use strict";
const form = document.getElementById("filter");
const words = document.getElementById("words");
const shown = document.getElementById("shown");
const choices = Array.from(form.querySelectorAll("select"));
const flips = Array.from(document.querySelectorAll("details.flip"), (element) => ({ element, text: null }));

function matches(flip) {
  if (choices.some(({ name, value }) => value && value !== flip.element.dataset[name])) return false;
  if (!words.value) return true;
  flip.text ??= flip.element.textContent.toLowerCase();
  return flip.text.includes(words.value.toLowerCase());
}

function apply() {
  let count = 0;
  for (const flip of flips) {
    flip.element.hidden = !matches(flip);
    count += !flip.element.hidden;
  }
  shown.value = `${count} shown`;
}

form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("close").addEventListener("click", () => {
  for (const flip of flips) flip.element.open = false;
});
form.hidden = flips.length === 0;
apply();
