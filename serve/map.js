// The map of the collection, for gr.HTML: `element` holds what serve/collection.py made, once it has arrived.
// Thumbnails are drawn on one canvas, from one image; a card shows the painting that is pointed at or has the focus.

const start = () => {
    const map = element.querySelector(".map");
    if (!map || map.dataset.ready) return;
    map.dataset.ready = "true";
    const {side, paintings, styles} = JSON.parse(map.dataset.content);
    const [canvas, output, card] = [".sheet > canvas", "output", ".card"].map(name => map.querySelector(name));
    const atlas = map.querySelector(".atlas"), context = canvas.getContext("2d");
    const columns = Math.ceil(Math.sqrt(paintings.length));
    const colour = style => `hsl(${360 * style / styles.length} 70% 50%)`;
    const view = {zoom: 1, x: 0, y: 0};  // of the map's top left corner, in CSS pixels
    const touches = new Map();
    let width = 0, height = 0, shown = paintings, current = null, moved = 0;

    const thumb = () => Math.min(side, Math.max(14, 0.6 * Math.sqrt(width * height / paintings.length)) * view.zoom ** 0.8);
    const place = painting => {
        const edge = 24;
        return [
            edge + view.x + painting.place[0] * (width - 2 * edge) * view.zoom,
            edge + view.y + painting.place[1] * (height - 2 * edge) * view.zoom,
        ];
    };

    const paint = (target, painting, x, y, size) => {
        const number = paintings.indexOf(painting), scale = size / side;
        const [w, h] = painting.size;
        const left = (number % columns) * side, top = Math.floor(number / columns) * side;
        target.drawImage(atlas, left, top, w, h, x - w * scale / 2, y - h * scale / 2, w * scale, h * scale);
        return [w * scale, h * scale];
    };

    const draw = () => {
        const ratio = window.devicePixelRatio || 1, size = thumb();
        canvas.width = width * ratio;
        canvas.height = height * ratio;
        context.setTransform(ratio, 0, 0, ratio, 0, 0);
        const order = current ? [...shown.filter(painting => painting !== current), current] : shown;
        for (const painting of order) {
            const [x, y] = place(painting);
            if (x < -size || y < -size || x > width + size || y > height + size) continue;
            const [w, h] = paint(context, painting, x, y, size);
            context.lineWidth = painting === current ? 4 : 2;
            context.strokeStyle = colour(painting.style);
            context.strokeRect(x - w / 2, y - h / 2, w, h);
        }
        canvas.style.touchAction = view.zoom > 1 ? "none" : "pan-y";  // a finger scrolls the page until one zooms in
    };

    const select = painting => {
        current = painting;
        card.hidden = !painting;
        if (painting) {
            const picture = card.querySelector("canvas"), [w, h] = painting.size, [x, y] = place(painting);
            picture.width = 2 * w;
            picture.height = 2 * h;
            paint(picture.getContext("2d"), painting, w, h, 2 * side);
            card.querySelector("p").textContent = painting.words;
            const gap = thumb() / 2 + 8, right = x + gap + card.offsetWidth < width;
            card.style.left = `${Math.max(0, right ? x + gap : x - gap - card.offsetWidth)}px`;
            card.style.top = `${Math.max(0, Math.min(y - card.offsetHeight / 2, height - card.offsetHeight))}px`;
        }
        draw();
    };

    const keep = () => {  // part of the map in sight
        for (const [key, length] of [["x", width], ["y", height]])
            view[key] = Math.min(0, Math.max(view[key], length * (1 - view.zoom)));
    };

    const zoom = (factor, x = width / 2, y = height / 2) => {
        const before = view.zoom;
        view.zoom = factor ? Math.min(20, Math.max(1, before * factor)) : 1;
        view.x = x - (x - view.x) * view.zoom / before;
        view.y = y - (y - view.y) * view.zoom / before;
        keep();
        select(current);
        map.dataset.scale = view.zoom.toFixed(2);
    };

    const filter = () => {
        const chosen = [...map.querySelectorAll("select")].map(box => [box.dataset.filter, box.value]);
        shown = paintings.filter(painting => chosen.every(([key, value]) => !value || painting[key] === Number(value)));
        output.textContent = `${shown.length} shown`;
        select(shown.includes(current) ? current : null);
    };

    const nearest = (x, y) => {
        const distance = painting => Math.hypot(place(painting)[0] - x, place(painting)[1] - y);
        const [best] = shown.map(painting => [distance(painting), painting]).sort((a, b) => a[0] - b[0]);
        return best && best[0] < Math.max(thumb(), 20) ? best[1] : null;
    };

    const step = (dx, dy) => {  // the next painting in a direction; sideways counts three times
        const [x, y] = current ? place(current) : [width / 2, height / 2];
        const cost = painting => {
            const [right, down] = [place(painting)[0] - x, place(painting)[1] - y];
            const along = right * dx + down * dy, across = Math.abs(right * dy) + Math.abs(down * dx);
            return along > 0.5 ? along + 3 * across : Infinity;
        };
        const [best] = shown.map(painting => [cost(painting), painting]).sort((a, b) => a[0] - b[0]);
        if (best && (best[0] < Infinity || !current)) {
            const [left, top] = place(best[1]);
            view.x += Math.min(0, width - 30 - left) + Math.max(0, 30 - left);
            view.y += Math.min(0, height - 30 - top) + Math.max(0, 30 - top);
            keep();
            select(best[1]);
        }
    };

    const position = event => {
        const box = canvas.getBoundingClientRect();
        return [event.clientX - box.left, event.clientY - box.top];
    };

    canvas.addEventListener("keydown", event => {
        const arrows = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
        if (arrows[event.key]) step(...arrows[event.key]);
        else if (event.key === "+" || event.key === "=") zoom(1.5, ...(current ? place(current) : []));
        else if (event.key === "-") zoom(1 / 1.5, ...(current ? place(current) : []));
        else if (event.key === "0") zoom(0);
        else if (event.key === "Escape") select(null);
        else return;
        event.preventDefault();
        event.stopPropagation();
    });
    canvas.addEventListener("focus", () => current || (canvas.matches(":focus-visible") && step(1, 0)));
    canvas.addEventListener("wheel", event => {
        event.preventDefault();
        zoom(Math.exp(-event.deltaY / 400), ...position(event));
    }, {passive: false});
    canvas.addEventListener("pointerdown", event => {
        canvas.setPointerCapture(event.pointerId);
        touches.set(event.pointerId, position(event));
        moved = 0;
    });
    canvas.addEventListener("pointermove", event => {
        const [x, y] = position(event), before = touches.get(event.pointerId);
        if (!before) return select(nearest(x, y));
        const other = [...touches].find(([id]) => id !== event.pointerId)?.[1];
        if (other) {
            const distance = point => Math.hypot(point[0] - other[0], point[1] - other[1]);
            zoom(distance([x, y]) / Math.max(1, distance(before)), ...other);
        } else {
            view.x += x - before[0];
            view.y += y - before[1];
            keep();
            select(current);
        }
        moved += Math.hypot(x - before[0], y - before[1]);
        touches.set(event.pointerId, [x, y]);
    });
    for (const name of ["pointerup", "pointercancel"])
        canvas.addEventListener(name, event => {
            touches.delete(event.pointerId);
            if (name === "pointerup" && moved < 6) select(nearest(...position(event)));
        });
    canvas.addEventListener("pointerleave", event => event.pointerType === "mouse" && select(null));
    map.querySelectorAll("select").forEach(box => box.addEventListener("change", filter));
    map.querySelectorAll("[data-zoom]").forEach(button =>
        button.addEventListener("click", () => zoom(Number(button.dataset.zoom))));
    styles.forEach((name, number) => {
        const item = document.createElement("li"), mark = document.createElement("span");
        mark.style.background = colour(number);
        item.append(mark, name);
        map.querySelector(".legend").append(item);
    });
    new ResizeObserver(() => {
        width = canvas.clientWidth;
        height = canvas.clientHeight;
        if (width) zoom(1);
    }).observe(canvas);
    atlas.decode().then(filter);
};

start();
new MutationObserver(start).observe(element, {childList: true, subtree: true});
