//! Where tests find real traces.

use std::path::{Path, PathBuf};

/// Finds a trace in the folder that `MANDOLINE_TRACES` names, `../shared/data` unless set; a relative folder counts from
/// the workspace. Without it a test says so and passes, unless `MANDOLINE_REQUIRE_ALL=1` forbids that.
pub(crate) fn trace(name: &str) -> Option<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = std::env::var("MANDOLINE_TRACES").unwrap_or_else(|_| "../shared/data".to_owned());
    let path = workspace.join(folder).join(name);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var("MANDOLINE_REQUIRE_ALL").as_deref() == Ok("1");
    assert!(!required, "{} is missing", path.display());
    println!("skipped: {} not found", path.display());
    None
}
