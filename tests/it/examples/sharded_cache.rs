//! A page is made once, and once more by each task that it moves to.

use serde_json::Value;

use super::{Scene, built, ctrl_c};
use crate::kit::{Process, ask, text, until};

#[test]
fn a_page_that_moves_is_made_once_more_and_no_more_than_once() {
    if built("sharded_cache").is_none() {
        return;
    }
    let scene = Scene::start("name: pages\nreport_every: 500ms\nbalance_every: 1s\n");
    let start = |name| scene.task("sharded_cache", &["task", name, "127.0.0.1:0"], name).0;
    let [pages_0, pages_1] = ["pages-0", "pages-1"].map(start);
    scene.settle("pages", 2);
    let mut front = Process::spawn(scene.example("sharded_cache", &["front", "127.0.0.1:0"]));
    let address = front.line("the front end is at ").parse().unwrap();
    let is_hit = |page: &str| {
        let answer = ask(address, "GET", &format!("/pages/{page}"), "").unwrap();
        assert_eq!((answer.status, answer.body), (200, format!("This is {page}.\n")));
        answer.head.contains("x-cache: hit")
    };
    let all: Vec<String> = (0..10).map(|page| format!("page-{page}")).collect();
    // All of them each time, so that a page that was asked for once is asked for again.
    let all_hit = || all.iter().filter(|page| !is_hit(page)).count() == 0;
    let fill = || until("every page to be in memory", || all_hit().then_some(()));
    assert!(!is_hit("home"), "nobody has made it before");
    fill();

    // There and back: what has left a task is not in its memory when it comes back.
    let owner = || {
        let shown = ["assignment", "show", "pages", "--key", "home", "-o", "json"];
        let shown: Value = serde_json::from_slice(&scene.operator(&shown).stdout).unwrap();
        shown["slices"][0]["replicas"][0]["task"].as_str().unwrap().to_owned()
    };
    let here = owner();
    let there = if here == "pages-0" { "pages-1" } else { "pages-0" };
    for to in [there, &here] {
        let pinned = scene.operator(&["assignment", "pin", "pages", "key:home", to]);
        assert!(pinned.status.success(), "{}", text(&pinned.stderr));
        until("the page to be made where it is now", || (!is_hit("home")).then_some(()));
        assert_eq!(owner(), to);
        assert_eq!([(); 5].map(|()| is_hit("home")), [true; 5], "once is enough");
    }
    for task in [&pages_0, &pages_1] {
        let said = task.stdout();
        assert!(said.contains("came: ") && said.contains("left: "), "{said}");
    }

    ctrl_c(pages_0);
    assert!(!is_hit("home"), "its memory is gone with its task");
    fill();
}
