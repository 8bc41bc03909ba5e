//! A profile is found from either region, where it lives; without the link only those beyond it are out of reach.

use super::{Scene, built};
use crate::kit::{Answer, ask, free_ports, local, until};

#[test]
fn a_profile_is_served_where_it_lives_and_found_from_either_region() {
    if built("two_regions").is_none() {
        return;
    }
    let homes = "homes: [{group: eu, region: eu}, {group: us, region: us}]";
    let scene = Scene::start(&format!("name: profiles\n{homes}\nbalance_every: 1s\n"));
    let places: Vec<String> =
        free_ports(5).into_iter().map(|port| local(port).to_string()).collect();
    let to_us = [format!("us={}", places[2]), format!("us={}", places[3])];
    let to_eu = [format!("eu={}", places[0]), format!("eu={}", places[1])];
    let start = |region: &str, name: &str, at: &String, others: &[String]| {
        let others = others.iter().map(String::as_str);
        let args: Vec<&str> = [region, name, at].into_iter().chain(others).collect();
        scene.task("two_regions", &args, name)
    };
    let _tasks = [
        start("eu", "eu-0", &places[0], &to_us),
        start("eu", "eu-1", &places[1], &to_us),
        start("us", "us-0", &places[2], &to_eu),
        start("us", "us-1", &places[3], &to_eu),
    ];
    let get = |at: &str, user: &str| -> Answer {
        ask(at.parse().unwrap(), "GET", &format!("/profiles/{user}"), "").unwrap()
    };

    let of = |home: &'static str| (0..6).map(move |user| format!("{home}/user-{user}"));
    let users: Vec<String> = of("eu").chain(of("us")).collect();
    until("each user's key to be at home", || {
        let at_home =
            |user: &&String| get(&places[0], user).body.contains(&format!("by {}-", &user[..2]));
        users.iter().all(|user| at_home(&user)).then_some(())
    });
    scene.settle("profiles", 4);
    for user in &users {
        let answers = until("the profile to be found by every task", || {
            let kept = ask(places[0].parse().unwrap(), "PUT", &format!("/profiles/{user}"), user)?;
            let answers: Vec<Answer> = places[..4].iter().map(|at| get(at, user)).collect();
            let is_found = answers.iter().chain([&kept]).all(|answer| answer.status == 200);
            is_found.then_some(answers)
        });
        let home = &user[..2];
        for (Answer { body, .. }, region) in answers.iter().zip(["eu", "eu", "us", "us"]) {
            assert!(body.starts_with(&format!("{user}, by {home}-")), "{region}: {body}");
            // At home nobody abroad is asked; from abroad a gateway there, which asks the owner if it is another.
            let abroad = body.split(", via ").skip(1).filter(|via| !via.contains(home)).count();
            assert_eq!(abroad, usize::from(region != home), "{region}: {body}");
            assert!(body.matches(", via ").count() <= 1 + abroad, "{region}: {body}");
        }
    }

    // A task that cannot reach the other region's gateways serves its own.
    let nobody = [format!("us={}", local(free_ports(1)[0]))];
    let (_cut_off, _) = start("eu", "eu-2", &places[4], &nobody);
    for user in &users {
        let Answer { status, body, .. } = get(&places[4], user);
        match &user[..2] {
            "eu" => assert!(status == 200, "{user}: {status} {body}"),
            _ => assert!(status == 503 && body.contains("region us"), "{user}: {status} {body}"),
        }
    }
}
