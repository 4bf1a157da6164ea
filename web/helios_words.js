// What our JavaScript says, in the page's language: locales/<language>/main.json, under "helios".

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const locales = await api // of all packs, by language
    .fetchApi("/i18n")
    .then(response => response.json())
    .catch(() => ({})) // the page then has words of no pack

/** The words at this key, with its {names} filled in; those of another language where this one has none. */
export function say(key, values = {}) {
    const language = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? navigator.language)
    const known = [language, language.split("-")[0], "en"].map(name => locales[name]?.helios?.[key])
    const text = known.find(words => words !== undefined) ?? key
    return text.replace(/\{(\w+)\}/g, (_, name) => values[name])
}

/** The page's own translations, which it shows to nobody (vue-i18n, provided to its components by a symbol). */
function translations() {
    const provided = document.querySelector("#vue-app")?.__vue_app__?._context?.provides ?? {}
    const values = Object.getOwnPropertySymbols(provided).map(symbol => provided[symbol]?.global)
    return values.find(value => value?.mergeLocaleMessage)
}

app.registerExtension({
    name: "Helios.Words",
    // Before nodes are registered. The page of 1.32 forgets what packs say when it loads a language other than English
    // after them; newer ones remember.
    init() {
        const page = translations()
        const language = page?.locale?.value
        if (locales[language]) page.mergeLocaleMessage(language, locales[language])
    },
})
