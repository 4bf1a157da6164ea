// What our JavaScript says, in the page's language: locales/<language>/main.json, under "helios".

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const locales = await api // of all packs, by language
    .fetchApi("/i18n")
    .then(response => response.json())
    .catch(() => ({})) // the page then has words of no pack

/** All of it: plain words by their key, and as functions what has {names} in it. */
export function words() {
    const language = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? navigator.language)
    const texts = Object.assign({}, ...["en", language.split("-")[0], language].map(name => locales[name]?.helios))
    const filled = (key, values) => texts[key]?.replace(/\{(\w+)\}/g, (_, name) => values[name])
    return {
        ...texts,
        numbers: (made, all) => filled(all === null ? "made" : "numbers", { made, all }),
        buffered: seconds => filled("buffered", { seconds }),
        speed: (chunks, times) => filled("speed", { chunks, times }),
        least: frames => filled("least", { frames }),
        applied: (after, transition) => filled("applied", { after, transition: Math.max(1, transition) }),
    }
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
