//! A web application whose tasks forward.

use super::{Scene, built};
use crate::kit::{ask, until};

#[test]
fn a_web_application_that_forwards_answers_the_same_wherever_it_is_asked() {
    if built("backhaul").is_none() {
        return;
    }
    let scene = Scene::start("name: carts\n");
    let start = |name| scene.task("backhaul", &[name, "127.0.0.1:0"], name);
    let tasks = ["carts-0", "carts-1"].map(start);
    scene.settle("carts", 2);
    let ask = |at: usize, user: &str, item: Option<&str>| {
        let (method, body) = item.map_or(("GET", ""), |item| ("POST", item));
        let answer = ask(tasks[at].1, method, &format!("/carts/{user}"), body).unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    };
    for user in (0..20).map(|n| format!("user-{n}")) {
        // Again, if the tasks have not heard of each other yet: what one takes for its own then is in a cart that nobody sees.
        until("both items to be in one cart", || {
            ask(0, &user, Some("apples"));
            ask(1, &user, Some("pears"));
            let [one, other] = [0, 1].map(|at| ask(at, &user, None));
            (one == other && one.contains("apples, pears")).then_some(())
        });
    }
}
