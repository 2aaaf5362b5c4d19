//! Checks the documentation against the repository: links resolve, the files that it names exist, and the code still has the messages that docs/troubleshooting.md explains.

use std::collections::HashMap;
use std::fs::read_to_string;
use std::path::{Component, Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// All files below a folder whose names end so.
fn files(folder: &Path, end: &str, found: &mut Vec<PathBuf>) {
    for entry in folder.read_dir().expect("a folder").map(|entry| entry.expect("an entry").path()) {
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if entry.is_dir() && !entry.is_symlink() && !matches!(name.as_str(), "target" | "build") && !name.starts_with('.') {
            files(&entry, end, found);
        } else if name.ends_with(end) {
            found.push(entry);
        }
    }
}

/// A page without its blocks of code.
fn prose(text: &str) -> String {
    text.split("```").step_by(2).collect()
}

/// The names under which headings of a page are linked to.
fn anchors(text: &str) -> Vec<String> {
    let headings =
        text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim().to_lowercase());
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, '-' | '_' | ' ');
    headings.map(|heading| heading.chars().filter(kept).collect::<String>().replace(' ', "-")).collect()
}

/// A path without `..`.
fn plain(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut plain, part| {
        if part == Component::ParentDir {
            plain.pop();
        } else {
            plain.push(part);
        }
        plain
    })
}

#[test]
fn links_resolve() {
    let mut pages = Vec::new();
    files(Path::new(ROOT), ".md", &mut pages);
    assert!(pages.len() > 20, "{pages:?}");
    let texts: HashMap<PathBuf, String> =
        pages.iter().map(|page| (page.clone(), prose(&read_to_string(page).unwrap()))).collect();
    let mut dead = Vec::new();
    for (page, text) in &texts {
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            if link.contains("://") || link.contains(' ') {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { page.clone() } else { plain(&page.parent().unwrap().join(path)) };
            let known = anchor.is_empty() || texts.get(&target).is_some_and(|text| anchors(text).iter().any(|a| a == anchor));
            if !target.exists() || !known {
                dead.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(dead.is_empty(), "{dead:#?}");
}

/// Pages that name files of other projects.
const OF_OTHERS: [&str; 3] = ["docs/tcpx.md", "docs/tcpxo.md", "docs/uccl-engine.md"];

/// Whether words in backticks name a file of the repository: a path to a file of source, or a Rust file alone. Hidden folders are not looked into.
fn names_a_file(words: &str) -> bool {
    let plain = words.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-'));
    let made = ["build/", "target/", "/", "."].iter().any(|folder| words.starts_with(folder))
        || words.split('/').any(|part| part == "NAME");
    let source = [".rs", ".sh", ".py", ".c", ".h", ".hpp", ".cpp", ".cu", ".cmake", ".toml", ".txt"];
    plain && !made && (words.ends_with(".rs") || words.contains('/') && source.iter().any(|end| words.ends_with(end)))
}

#[test]
fn files_that_pages_name_exist() {
    let (mut pages, mut all) = (Vec::new(), Vec::new());
    files(&Path::new(ROOT).join("docs"), ".md", &mut pages);
    pages.extend(["README.md", "CONTRIBUTING.md"].map(|page| Path::new(ROOT).join(page)));
    files(Path::new(ROOT), "", &mut all);
    let all: Vec<String> = all.iter().map(|file| format!("/{}", file.strip_prefix(ROOT).unwrap().display())).collect();
    let (mut seen, mut missing) = (0, Vec::new());
    for page in &pages {
        let name = page.strip_prefix(ROOT).unwrap().display().to_string();
        if OF_OTHERS.contains(&&*name) {
            continue;
        }
        for words in prose(&read_to_string(page).unwrap()).split('`').skip(1).step_by(2).filter(|words| names_a_file(words)) {
            seen += 1;
            if !all.iter().any(|file| file.ends_with(&format!("/{words}"))) {
                missing.push(format!("{name}: {words}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(seen > 100, "only {seen} names of files were found");
}

/// The constant parts of a message in groups of three words: without numbers and names.
fn threes(message: &str) -> Vec<Vec<String>> {
    let name = |word: &str| word.chars().filter(char::is_ascii_uppercase).count() > 1;
    let varies = |word: &&str| name(word) || word.contains(|c: char| c.is_ascii_digit() || matches!(c, '"' | '=' | '.' | '\''));
    let words: Vec<&str> = message.split_whitespace().collect();
    let pieces = words.split(|word| varies(word)).flat_map(|piece| piece.split_inclusive(|word| word.ends_with([':', ';', ','])));
    pieces
        .map(|piece| piece.windows(3).map(|three| three.join(" ").trim_end_matches([':', ';', ',']).to_owned()).collect())
        .collect()
}

#[test]
fn explained_messages_exist_in_the_code() {
    let mut sources = Vec::new();
    for folder in ["src", "soft-plugin/src"] {
        files(&Path::new(ROOT).join(folder), ".rs", &mut sources);
    }
    // A message may go over several lines.
    let mut said: String = sources.iter().map(|path| read_to_string(path).unwrap().replace("\\\n", " ")).collect();
    said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    (1..134).for_each(|errno| said += &format!("{}\n", std::io::Error::from_raw_os_error(errno)));
    let page = read_to_string(format!("{ROOT}/docs/troubleshooting.md")).unwrap();
    let cells = page.lines().filter_map(|line| line.strip_prefix("| ")).filter_map(|line| line.split('|').next());
    let (mut judged, mut gone) = (0, Vec::new());
    for message in cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)) {
        // Fewer than four words say too little.
        for threes in threes(message).iter().filter(|threes| threes.len() > 1) {
            judged += 1;
            // Formatted values break some of them.
            if threes.iter().filter(|three| said.contains(*three)).count() * 3 < threes.len() * 2 {
                gone.push(format!("{threes:?} of {message}"));
            }
        }
    }
    assert!(judged > 20, "{judged}");
    assert!(gone.is_empty(), "{gone:#?}");
}
