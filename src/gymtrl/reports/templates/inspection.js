"use strict";
const form = document.getElementById("filter");
const words = document.getElementById("words");
const kind = document.getElementById("kind");
const shown = document.getElementById("shown");
const rollouts = Array.from(document.querySelectorAll("details.rollout"), (element) => ({ element, text: null }));

function matches(rollout) {
  const { verdict, outcome } = rollout.element.dataset;
  if (kind.value && kind.value !== verdict && kind.value !== outcome) return false;
  if (!words.value) return true;
  rollout.text ??= rollout.element.textContent.toLowerCase();
  return rollout.text.includes(words.value.toLowerCase());
}

function apply() {
  let count = 0;
  for (const rollout of rollouts) {
    rollout.element.hidden = !matches(rollout);
    count += !rollout.element.hidden;
  }
  shown.value = `${count} shown`;
}

form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("close").addEventListener("click", () => {
  for (const rollout of rollouts) rollout.element.open = false;
});
form.hidden = false;
apply();
