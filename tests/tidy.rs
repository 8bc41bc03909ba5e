//! The house rules, as tests: which crate may use which, modules in order of use, openraft in its folder, and so on.
//!
//! A rule that a machine can check is not for people to remember. Each failure names the file, the line and the rule.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which crates of the workspace each crate may use. `assigner` and `router-lib` never see each other.
const EDGES: [(&str, &[&str]); 9] = [
    ("core", &[]),
    ("proto", &["core"]),
    ("distributor", &["core", "proto"]),
    ("assigner", &["core", "proto", "distributor"]),
    ("router-lib", &["core", "proto", "distributor"]),
    ("proxy", &["core", "router-lib"]),
    ("sim", &["core"]),
    ("cli", &["core", "proto", "distributor", "assigner", "router-lib", "proxy", "sim"]),
    ("examples", &["router-lib"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace is there")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below a folder with this ending, in order.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.expect("a folder can be read").path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// All Rust files of the workspace, by their path from the root.
fn sources() -> Vec<(String, String)> {
    let root = root();
    let folders = EDGES.iter().map(|(folder, _)| *folder).chain(["tests"]);
    let paths = folders.flat_map(|folder| files(&root.join(folder), ".rs"));
    paths.map(|path| (name(&path), read(&path))).collect()
}

fn name(path: &Path) -> String {
    path.strip_prefix(root()).expect("it lies below the root").to_string_lossy().into_owned()
}

fn report(rule: &str, broken: &[String]) {
    assert!(broken.is_empty(), "\n{rule}:\n  {}\n", broken.join("\n  "));
}

#[test]
fn every_file_says_what_it_is() {
    let silent = sources().into_iter().filter(|(_, text)| !text.starts_with("//!"));
    report("each file opens with `//!`", &silent.map(|(name, _)| name).collect::<Vec<_>>());
}

#[test]
fn crates_use_only_what_stands_left_of_them() {
    let packages: BTreeMap<String, &str> = EDGES
        .iter()
        .map(|(folder, _)| (package(&read(&root().join(folder).join("Cargo.toml"))), *folder))
        .collect();
    let mut broken = Vec::new();
    for (folder, allowed) in EDGES {
        let manifest = read(&root().join(folder).join("Cargo.toml"));
        for line in manifest.lines() {
            let used = line.split(['.', ' ', '=']).next().unwrap_or_default();
            // A crate's own tests may switch on a feature of it.
            let is_own = |used: &&&str| **used == folder;
            let used = packages.get(used).filter(|used| !is_own(used));
            if let Some(used) = used.filter(|used| !allowed.contains(used)) {
                broken.push(format!("{folder}/Cargo.toml: {folder} may not use {used}"));
            }
        }
    }
    report(
        "core <- proto <- distributor <- assigner; distributor <- router-lib <- proxy; core <- sim",
        &broken,
    );
}

fn package(manifest: &str) -> String {
    let line =
        manifest.lines().find(|line| line.starts_with("name = ")).expect("a package has a name");
    line.trim_start_matches("name = ").trim_matches('"').to_owned()
}

/// A module's children in the order in which it lists them.
fn children(text: &str) -> Vec<String> {
    let mut children = Vec::new();
    let mut testing = false;
    for line in text.lines() {
        let declared = ["pub mod ", "mod ", "pub(crate) mod "]
            .iter()
            .find_map(|start| line.strip_prefix(start));
        match declared.and_then(|rest| rest.strip_suffix(';').or_else(|| rest.strip_suffix(" {"))) {
            Some(child) if !testing => children.push(child.to_owned()),
            _ => {}
        }
        testing = line == "#[cfg(test)]";
    }
    children
}

/// Where the file of a module is, and where its children are.
fn module_file(folder: &Path, module: &str) -> Option<(PathBuf, PathBuf)> {
    let flat = folder.join(format!("{module}.rs"));
    let nested = folder.join(module).join("mod.rs");
    [flat, nested].into_iter().find(|file| file.exists()).map(|file| (file, folder.join(module)))
}

/// Checks one list of modules: each may use only those above it.
fn check_order(file: &Path, folder: &Path, prefix: &str, broken: &mut Vec<String>) {
    let list = children(&read(file));
    for (index, module) in list.iter().enumerate() {
        let Some((file, below)) = module_file(folder, module) else { continue };
        let own = files(&below, ".rs");
        for source in own.iter().chain([&file]).collect::<BTreeSet<_>>() {
            if source.components().any(|part| part.as_os_str() == "tests")
                || source.ends_with("tests.rs")
            {
                continue;
            }
            for (number, line) in product_lines(&read(source)) {
                for used in uses(line, prefix) {
                    let place = list.iter().position(|other| *other == used);
                    let allowed = place.is_some_and(|place| place <= index)
                        || (place.is_none() && prefix != "crate::");
                    if !allowed {
                        let why = if place.is_some() {
                            "stands below it"
                        } else {
                            "is no module: no use through the root"
                        };
                        broken.push(format!(
                            "{}:{number}: {module} uses {prefix}{used}, which {why}",
                            name(source)
                        ));
                    }
                }
            }
        }
        if file.ends_with("mod.rs") || below.is_dir() {
            check_order(&file, &below, &format!("{prefix}{module}::"), broken);
        }
    }
}

/// The lines before a file's tests, with their numbers.
fn product_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line));
    let code = lines.take_while(|(_, line)| *line != "#[cfg(test)]");
    code.filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// The names that follow a prefix in a line.
fn uses(line: &str, prefix: &str) -> Vec<String> {
    let name = |rest: &str| {
        rest.split(|c: char| !(c.is_alphanumeric() || c == '_'))
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let mut found = Vec::new();
    for (at, _) in line.match_indices(prefix) {
        let before = line[..at].chars().next_back();
        let rest = &line[at + prefix.len()..];
        if !before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '$')) {
            match rest.strip_prefix('{') {
                Some(group) => found.extend(
                    group.split(',').map(|part| name(part.trim())).filter(|part| !part.is_empty()),
                ),
                None => found.push(name(rest)),
            }
        }
    }
    found
}

#[test]
fn modules_are_listed_in_order_of_use() {
    let mut broken = Vec::new();
    for (folder, _) in EDGES {
        let source = root().join(folder).join("src");
        for top in
            ["lib.rs", "main.rs"].map(|file| source.join(file)).iter().filter(|file| file.exists())
        {
            check_order(top, &source, "crate::", &mut broken);
        }
    }
    report("a module uses only what stands above it, by its own path", &broken);
}

#[test]
fn the_order_test_sees_what_is_wrong() {
    assert_eq!(uses("use crate::slice::Slice;", "crate::"), ["slice"]);
    assert_eq!(uses("use crate::{key, slice::Slice};", "crate::"), ["key", "slice"]);
    assert_eq!(uses("let plan = crate::plan::make(crate::key::MIN);", "crate::"), ["plan", "key"]);
    assert_eq!(uses("use mandoline_core::slice::Slice;", "crate::"), Vec::<String>::new());
    assert_eq!(children("//! x\npub mod a;\nmod b;\n#[cfg(test)]\nmod tests;\n"), ["a", "b"]);
}

#[test]
fn openraft_is_named_in_one_folder_only() {
    let mut broken = Vec::new();
    for (name, text) in sources().iter().filter(|(name, _)| !name.starts_with("assigner/src/raft/"))
    {
        let code =
            text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"));
        let named = code.filter(|(_, line)| line.contains("openraft") && name != "tests/tidy.rs");
        broken.extend(named.map(|(index, line)| format!("{name}:{}: {}", index + 1, line.trim())));
    }
    report("openraft is named only under assigner/src/raft", &broken);
}

#[test]
fn the_library_that_users_link_has_no_openraft_in_its_tree() {
    let tree = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--offline",
            "--locked",
            "--edges",
            "normal",
            "--package",
            "mandoline",
            "--prefix",
            "none",
        ])
        .current_dir(root())
        .output()
        .expect("cargo can be started");
    let text = String::from_utf8_lossy(&tree.stdout);
    assert!(
        tree.status.success() && text.contains("mandoline-core"),
        "{}",
        String::from_utf8_lossy(&tree.stderr)
    );
    for heavy in ["openraft", "redb", "clap v", "hyper-rustls"] {
        assert!(
            !text.lines().any(|line| line.starts_with(heavy)),
            "{heavy} is in the tree of router-lib"
        );
    }
}

#[test]
fn no_test_file_is_forgotten() {
    let main = read(&root().join("tests/it/main.rs"));
    let declared = children(&main);
    let present = files(&root().join("tests/it"), ".rs")
        .into_iter()
        .filter(|path| !path.ends_with("main.rs"));
    let first = |path: &Path| {
        let below = path.strip_prefix(root().join("tests/it")).expect("it lies below").to_owned();
        below
            .components()
            .next()
            .expect("a path has a part")
            .as_os_str()
            .to_string_lossy()
            .replace(".rs", "")
    };
    let forgotten = present.filter(|path| !declared.contains(&first(path))).map(|path| name(&path));
    report("tests/it/main.rs lists every file beside it", &forgotten.collect::<Vec<_>>());
}

#[test]
fn every_decision_is_listed() {
    let list = read(&root().join("docs/adr/README.md"));
    let missing = files(&root().join("docs/adr"), ".md").into_iter().filter_map(|path| {
        let file = path.file_name()?.to_string_lossy().into_owned();
        (file != "README.md" && !list.contains(&file)).then_some(file)
    });
    report("docs/adr/README.md lists every ADR", &missing.collect::<Vec<_>>());
}

#[test]
fn every_metric_is_documented() {
    let documented = read(&root().join("docs/metrics.md"));
    let mut missing = Vec::new();
    let is_of_metrics = |name: &str| name.ends_with("metrics.rs") || name.contains("/metrics/");
    for (file, text) in sources().iter().filter(|(name, _)| is_of_metrics(name)) {
        let product: Vec<&str> = product_lines(text).map(|(_, line)| line).collect();
        let product = product.join(" ");
        let literals: Vec<&str> = product.split('"').skip(1).step_by(2).collect();
        let prefix = product.split("with_prefix(\"").nth(1).and_then(|rest| rest.split('"').next());
        let registered = product
            .split("register(")
            .skip(1)
            .filter_map(|rest| rest.trim_start().strip_prefix('"'));
        let short = registered.filter_map(|rest| rest.split('"').next());
        let prefixed = short.filter_map(|name| Some(format!("{}_{name}", prefix?)));
        let whole =
            literals.iter().filter(|text| text.starts_with("mandoline_") && Some(**text) != prefix);
        for name in prefixed.chain(whole.map(|name| (*name).to_owned())) {
            if !documented.contains(&format!("`{name}`")) {
                missing.push(format!("{file}: {name}"));
            }
        }
    }
    report("docs/metrics.md names every metric", &missing);
}

#[test]
fn nothing_names_the_machine_that_it_was_written_on() {
    let listed = Command::new("git").args(["ls-files"]).current_dir(root()).output();
    let Ok(listed) = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    else {
        println!("skipped: git not found");
        return;
    };
    let mut broken = String::new();
    for file in listed.lines().filter(|file| *file != "tests/tidy.rs") {
        let Ok(text) = fs::read_to_string(root().join(file)) else { continue };
        for (index, line) in text.lines().enumerate() {
            if ["/work/", "/root/", "/tmp/bash_jobs"].iter().any(|path| line.contains(path)) {
                writeln!(broken, "{file}:{}: {line}", index + 1).expect("a string takes it");
            }
        }
    }
    assert!(broken.is_empty(), "\npaths of one machine:\n{broken}");
}
